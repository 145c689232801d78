"""Models, one file each; :mod:`recbole_ssm.registry` lists them."""
