"""Builds the package; see pyproject.toml. The compiled extension takes its place here."""

from setuptools import setup

setup()
