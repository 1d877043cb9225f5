from setuptools import find_packages, setup

# The rest is in pyproject.toml, which has no way to take found packages and one more.
setup(
    packages=[*find_packages(include=["oanet_d2", "oanet_d2.*"]), "oanet_d2.configs"],
    package_dir={"oanet_d2.configs": "configs"},
    include_package_data=False,  # no more than this:
    package_data={
        "oanet_d2": ["py.typed"],
        "oanet_d2.configs": ["**/*.yaml", "**/*.py"],
        "oanet_d2.report": ["template/*"],
    },
)
