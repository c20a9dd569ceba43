"""What an exit costs on this machine: the package behind `kvmexit bench`; docs/performance.md has the method.

cells.py: what is measured, and the guests; measure.py: turns and pairing; statistics.py: figures of the samples;
machine.py: where they are from; report.py, plots.py: tables, HTML, histograms; compare.py: two results. A result is what
its JSON says (schema.json): all reports are made of that alone.
"""
