"Everything that pip needs to know, read from settings.ini; experiments go into the wheel."

import json
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent.resolve()
parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
versions = [
    o
    for o in ["3.11", "3.12", "3.13", "3.14"]
    if tuple(map(int, o.split("."))) >= tuple(map(int, cfg["min_python"].split(".")))
]
statuses = [
    "1 - Planning",
    "2 - Pre-Alpha",
    "3 - Alpha",
    "4 - Beta",
    "5 - Production/Stable",
    "6 - Mature",
    "7 - Inactive",
]
extras = {
    k.removesuffix("_requirements"): cfg[k].split() for k in cfg if k.endswith("_requirements")
}


def without_outputs(nb):
    "A notebook to be run: its pictures, a tenth of the wheel, stand in the documentation."
    found = json.loads(nb.read_text(encoding="utf-8"))
    for cell in found["cells"]:
        if cell["cell_type"] == "code":
            cell.update(outputs=[], execution_count=None)
    found["metadata"].pop("widgets", None)
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


class BuildPy(build_py):
    "`build_py` that also ships the experiments, so that `uniemo run` works when installed."

    def experiments(self):
        return sorted((here / cfg["nbs_path"] / "experiments").glob("*.ipynb"))

    def target(self, nb):
        return Path(self.build_lib) / cfg["lib_path"] / "experiments" / nb.name

    def run(self):
        super().run()
        if self.editable_mode:
            return  # a checkout has them in nbs/
        for nb in self.experiments():
            self.target(nb).parent.mkdir(parents=True, exist_ok=True)
            self.target(nb).write_text(without_outputs(nb), encoding="utf-8")

    def get_outputs(self, include_bytecode=True):
        return super().get_outputs(include_bytecode) + (
            [] if self.editable_mode else [str(self.target(o)) for o in self.experiments()]
        )


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    keywords=cfg["keywords"].split(),
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    license_files=["LICENSE", "uniemo/assets/OFL.txt"],
    url=cfg["git_url"],
    project_urls={
        "Documentation": cfg["doc_host"] + cfg["doc_baseurl"],
        "Paper": "https://arxiv.org/abs/2507.23372",
    },
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    classifiers=[
        "Development Status :: " + statuses[int(cfg["status"]) - 1],
        "Intended Audience :: " + cfg["audience"],
        "Natural Language :: " + cfg["language"],
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        *["Programming Language :: Python :: " + o for o in ["3", *versions]],
    ],
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    python_requires=">=" + cfg["min_python"],
    package_data={cfg["lib_path"]: ["assets/**"]},
    include_package_data=True,
    zip_safe=False,
    cmdclass={"build_py": BuildPy},
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": cfg["console_scripts"].split("\n"),
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
)
