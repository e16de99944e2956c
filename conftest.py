"""Tests leave a GPU to those that ask for it: JAX simulates devices on the host, where arrays need no copies."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
