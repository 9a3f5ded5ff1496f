"""What pyproject.toml cannot say: conf/ and data_manifests/ travel inside the package.

They become ``vipllava/_conf`` and ``vipllava/_data_manifests`` of a wheel; where they are is
answered by ``vipllava.config.places``.
"""

from setuptools import find_namespace_packages, setup

KINDS = ("css", "html", "jinja", "js", "json")  # of files of the package that are no Python
CARRIED = {f"vipllava._{name}": name for name in ("conf", "data_manifests")}

setup(
    packages=[*find_namespace_packages(include=["vipllava*"], exclude=["*.__pycache__"]), *CARRIED],
    package_dir=CARRIED,
    package_data={"vipllava": ["sample_world/base/**/*", *(f"**/*.{kind}" for kind in KINDS)]}
    | {name: ["**/*.yaml"] for name in CARRIED},
)
