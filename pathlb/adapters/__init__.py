"""One thin translation per HTTP library; `httpx2.py` is `httpx.py` with the other library's name (tested)."""
