"""What an exit costs on this machine: the package behind `kvmexit bench`; docs/performance.md has the method.

cells.py: what is measured, and the guests; measure.py: turns and pairing; figures.py: statistics; machine.py: where
figures are from; report.py, files.py, plots.py: text, HTML, histograms; compare.py: two results. A result is what its
JSON says (schema.json): all reports are made of that alone.
"""
