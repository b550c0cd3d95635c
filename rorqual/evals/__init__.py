"""Measuring a model: metrics with their counter-metrics, suites, runs that survive a kill, tables, plots and a report.

Suites run against a model loaded in this process or against any OpenAI-compatible URL. Generators and graders of
the items live in `rorqual.data.tasks`.
"""
