"""Applications built on the core; nothing below imports them.

Each folder is one: automatic settings, fine-tuning, search, explanation, export, report, server, ablation, doctor.
"""
