"""The recipe, the chain of stages, evaluation, the report, and the ``edgebert`` command."""
