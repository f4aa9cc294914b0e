"""The main path: the loop (`train3d.py`), one step (`ssl_meta_arch.py`), schedules, state, monitors."""
