"""What docs/design.md, CONTRIBUTING.md, CITATION.cff and LICENSE say is so."""

import re
import tomllib

import pytest
import yaml
from cli import ROOT
from test_layering import ORDER

PAGES = ("docs/design.md", "CONTRIBUTING.md")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page):
  """Files, directories, links, and the names that a page says lie in a file."""
  text = (ROOT / page).read_text()
  paths = set(re.findall(r"(?<![\w./])(?:w2s_jax|tests|configs|docs)/[\w/]*(?:\.\w+)?", text))
  assert len(paths) > 5
  assert not [path for path in paths if not (ROOT / path).exists()]
  links = re.findall(r"\]\((?!https:)([^)#]+)\)", text)
  assert links and not [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
  names = re.findall(r"`(\w+)`\s+in\s+`(w2s_jax/[\w/]+\.py)`", text)
  assert len(names) >= 4
  assert not [(name, path) for name, path in names
              if not re.search(rf"^(class |def )?{name}\b", (ROOT / path).read_text(), re.M)]


def test_the_drawing_of_packages_is_the_order_that_is_tested():
  drawing, = re.findall(r"```text layers\n(.*?)```", (ROOT / "docs/design.md").read_text(), re.S)
  rooms = [room for line in drawing.splitlines() for room in re.split(r" {3,}", line)[0].split()]
  assert rooms == list(ORDER)


def test_the_citation_has_what_its_format_requires_and_the_projects_version():
  citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
  assert {"cff-version", "message", "title", "authors"} <= citation.keys()
  assert (citation["cff-version"], citation["version"]) == ("1.2.0", PROJECT["version"])
  paper, = citation["references"]
  assert {"type", "title", "authors"} <= paper.keys()
  assert [i["value"] for i in paper["identifiers"]] == ["arXiv:2410.14425"]


def test_one_licence_everywhere():
  citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
  assert PROJECT["license"] == citation["license"] == "Apache-2.0"
  licence = (ROOT / "LICENSE").read_text()
  assert "Apache License\n                           Version 2.0, January 2004" in licence
  assert re.findall(r"Copyright .*20\d\d.*", licence) == ["Copyright 2026 The w2s_jax authors"]


def test_the_readme_leads_there():
  readme = (ROOT / "README.md").read_text()
  assert not [page for page in (*PAGES, "LICENSE") if f"]({page})" not in readme]
