"""One self-contained HTML page about a run, its bundle and its latency: numbers, charts and a model card.

The page loads nothing: styles are inline, charts are inline SVG, there is no script, and its own content security
policy forbids all three. The same input gives the same bytes. numpy, the standard library and jinja2 only.
"""
