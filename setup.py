"""Packages are discovered; the data files of the top-level `pipelines/` and `model_cards/` are installed with them."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["llmquant", "llmquant.*"]), "llmquant.pipelines", "llmquant.model_cards"])
