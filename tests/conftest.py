"""No test reaches for the network, and pytest's workers share the cores instead of fighting for them."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
