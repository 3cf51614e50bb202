"""What docs/support.md says, as one list: checks, each run on fastrnn's modules and, unchanged, on torch.nn's.

A case is a kind of module, an option and a check. ``test_support.py`` runs every case. Those in ``failures.json`` must
fail, with the error that stands there, and all others must pass: so the page, which is written from these lists, cannot
be out of date.
"""
