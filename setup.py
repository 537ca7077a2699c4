"""What pyproject.toml cannot say: folders at the top of the repository that a wheel has inside the package.

`steer/checkpoint/shipped.py` finds them in both places. Which of their files go along is in pyproject.toml.
"""

from setuptools import find_namespace_packages, setup

SHIPPED = {"steer.shipped.dictionaries": "dictionaries", "steer.shipped.merge": "examples/merge"}

setup(packages=[*find_namespace_packages(include=["steer*"]), *SHIPPED], package_dir=SHIPPED)
