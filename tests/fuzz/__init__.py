"""Files as disks, editors and strangers change them, and settings as people mistake them, by the thousand:
see :mod:`tests.fuzz.campaign`."""
