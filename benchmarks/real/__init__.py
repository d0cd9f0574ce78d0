"""Parts of real_model.py: checkpoint, text, candidates, figures, times, report."""
