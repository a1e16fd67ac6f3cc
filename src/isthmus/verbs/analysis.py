"""Verbs that analyse: plans, sweeps, figures."""

import typer

app = typer.Typer()
