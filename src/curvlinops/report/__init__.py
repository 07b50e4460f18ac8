"""From a model to tables, verdicts and files in one command.

What a report contains is in :mod:`curvlinops.report._contents`, how it is read and
written in :mod:`curvlinops.report._files`.
"""
