"""All that shows on a GPU, in one folder and one command: `make gpu-bundle` makes it, its run.sh writes a report.

`plan` says what is run, `runner` runs it, one process a stage, and `record` and `markdown` make the report of what
these processes tell (`events`).
"""
