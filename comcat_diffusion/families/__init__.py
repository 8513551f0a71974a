"""Families of bases: one file each, about a page, that says all that is special about it and nothing else.

Training, drawing, evaluation and export ask the family of a base and look at no class names themselves. A new family is
one file here and one line in known.py (CONTRIBUTING.md says how). Nothing in this folder imports torch when it is
imported, so that settings and files are checked against a family before torch is waited for.
"""
