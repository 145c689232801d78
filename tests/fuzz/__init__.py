"""Files as disks, editors and strangers change them, by the thousand: see :mod:`tests.fuzz.campaign`."""
