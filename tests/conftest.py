"""JAX takes the host, unless a test asks for a GPU: there devices are simulated, and nothing needs to be copied."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
