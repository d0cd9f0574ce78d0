"""One file per peer. Each has ``load(shapes, threads, options)``, which returns a
:class:`comparison.work.Peer`; ``options`` is what comparison/candidates.py says for it."""
