"""What pyproject.toml has no word for: configs/ lies beside the package here, and is installed inside it."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["w2s_jax*"]), "w2s_jax.configs"],
      package_dir={"w2s_jax.configs": "configs"})
