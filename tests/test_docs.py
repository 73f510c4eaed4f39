"""README, docs/, CONTRIBUTING.md, CITATION.cff and LICENSE are short, and agree with the code and each other."""

import re
import textwrap
import tomllib
import types

import jax.numpy as jnp
import numpy as np
import pytest
import rig
import yaml
from cli import ROOT
from test_layering import ORDER

from w2s_jax import losses
from w2s_jax.defenses import distill, lora_ce
from w2s_jax.models import ClassifierOutput
from w2s_jax.tasks import CLASSIFICATION

PAGES = ("docs/design.md", "docs/extending.md", "CONTRIBUTING.md")
PROSE = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page):
  """Files, directories and links exist. A name that a page places in a file is defined there."""
  text = (ROOT / page).read_text()
  paths = set(re.findall(r"(?<![\w./])(?:w2s_jax|tests|configs|docs)/[\w/]*(?:\.\w+)?", text))
  paths -= {"w2s_jax/defenses/smooth.py", "tests/test_smooth.py"}     # what the walk-through writes
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
  """The README links to each of PAGES and to the licence."""
  readme = (ROOT / "README.md").read_text()
  assert not [page for page in (*PAGES, "LICENSE") if f"]({page})" not in readme]


def test_the_readme_is_short():
  readme = (ROOT / "README.md").read_text()
  assert len(readme.splitlines()) <= 150 and len(readme.split()) <= 1300


@pytest.mark.parametrize("page", PROSE)
def test_no_paragraph_is_longer_than_four_lines(page):
  """A line has 120 columns; tables, headings and code are no prose."""
  text = re.sub(r"(?ms)^```.*?^```$", "", (ROOT / page).read_text())
  items = [item for block in re.split(r"\n{2,}", text) for item in re.split(r"(?m)^(?=- |\d+\. )", block)]
  prose = [item for item in items if item.strip() and not item.startswith(("|", "#", "    "))]
  assert prose
  assert not [item for item in prose if len(textwrap.wrap(" ".join(item.split()), 120)) > 4]


def anchors(text):
  """The anchors that GitHub makes of a page's headings."""
  heads = re.findall(r"(?m)^#+ (.*)$", re.sub(r"(?ms)^```.*?^```$", "", text))
  return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [*PROSE, "CONTRIBUTING.md", "benchmarks/README.md"])
def test_every_internal_link_leads_somewhere(page):
  text = (ROOT / page).read_text()
  for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
    linked = (ROOT / page).parent / target if target else ROOT / page
    assert linked.exists(), target
    if anchor:
      assert anchor in anchors(linked.read_text()), f"{target}#{anchor}"


def test_the_index_lists_every_page():
  index = (ROOT / "docs/README.md").read_text()
  pages = [page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md"]
  assert len(pages) > 8 and not [name for name in pages if f"]({name})" not in index]
  notes = (ROOT / "docs/results.md").read_text()
  assert not [page.name for page in (ROOT / "docs/notes").glob("*.md") if f"](notes/{page.name})" not in notes]


def test_the_defense_of_the_walk_through(llama, tmp_path):
  """The defense of docs/extending.md trains. Without smoothing its loss is plain cross entropy."""
  code, line = re.findall(r"```python\n(.*?)```", (ROOT / "docs/extending.md").read_text(), re.S)[:2]
  smooth = types.ModuleType("smooth")
  exec(code, vars(smooth))
  defense = eval(f"{{{line}}}", {"Defense": lambda recipe, settings: (recipe, settings), "smooth": smooth})
  recipe, declared = defense["smooth"]
  settings = rig.DEFENSE.copy_and_resolve_references()
  settings.smooth = {"smoothing": declared["smooth"]().smoothing}
  suspect = rig.suspect(*llama, tmp_path)
  distill.check("smooth", recipe, CLASSIFICATION, suspect.model, settings)
  trained, = distill.train(recipe, suspect, settings, {"smooth": 0})
  plain, = distill.train(lora_ce.RECIPE, suspect, settings, {"plain": 0})
  dev = suspect.encode(suspect.dev)
  smoothed, sharp = (np.asarray(suspect.place.logits(suspect.model, params, dev)) for params in (trained, plain))
  assert (smoothed.argmax(-1) == dev["label"]).mean() > 0.9 and np.ptp(smoothed) < np.ptp(sharp)
  logits, labels = jnp.array([[2.0, -1.0, 0.5], [0.0, 0.0, 3.0]]), jnp.array([1, 2])
  out = ClassifierOutput(logits, logits, logits, logits)
  batch = {"label": labels, "weight": jnp.ones(2)}
  settings.smooth.smoothing = 0.0
  np.testing.assert_allclose(smooth.terms(out, batch, settings, CLASSIFICATION)["ce"],
                             losses.cross_entropy(logits, labels), rtol=1e-6)
