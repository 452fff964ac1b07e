"""What Calotype is made of: bounds above known holes, nothing that is not named, and an audit that is not fooled."""

import ast
import json
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from calotype import doctor_packages
from calotype.known_holes import HOLES

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ROOMS = ("calotype", "stage1_vae", "stage2_diffusion", "density", "pipeline", "demo")
LEAST = {"torch": "2.10", "diffusers": "0.38", "gradio": "6.25", "pillow": "12.3", "safetensors": "0.8"}
WITH_OTHERS = {"scipy": "scikit-learn", "pydantic_core": "pydantic"}  # modules that come with the package of another


def asked():
    """Every requirement, of extras too: (extra, requirement)."""
    groups = {"": PROJECT["dependencies"]} | PROJECT["optional-dependencies"]
    return [(extra, Requirement(text)) for extra, texts in groups.items() for text in texts]


def bound(requirement):
    """The lowest version that is let in."""
    lower = [Version(part.version) for part in requirement.specifier if part.operator == ">="]
    return max(lower, default=Version("0"))


@pytest.mark.parametrize("extra, requirement", asked(), ids=str)
def test_no_bound_lets_a_version_with_a_known_hole_in(extra, requirement):
    name = canonicalize_name(requirement.name)
    assert requirement.specifier, "no lower bound at all"
    if name in HOLES:
        assert bound(requirement) >= Version(HOLES[name].fixed), HOLES[name].known_as
    if name in LEAST:
        assert bound(requirement) >= Version(LEAST[name])


def test_what_must_be_bounded_is_named():
    assert set(LEAST) <= {canonicalize_name(requirement.name) for extra, requirement in asked() if not extra}
    for name in ("starlette", "python-multipart", "orjson", "h11"):  # between the demo and the network
        assert name in {canonicalize_name(requirement.name) for extra, requirement in asked() if not extra}


def test_extras_agree_on_a_package():
    bounds = {}
    for _, requirement in asked():
        bounds.setdefault(canonicalize_name(requirement.name), set()).add(str(requirement.specifier))
    assert {name: found for name, found in bounds.items() if len(found) > 1} == {}


def test_what_is_installed_obeys():
    wrong = {r.name: metadata.version(r.name) for _, r in asked() if not r.specifier.contains(metadata.version(r.name))}
    assert wrong == {}
    finding = doctor_packages.holes()
    assert finding.verdict == "pass", finding
    assert len(HOLES) - 2 <= int(finding.found.split("in the ")[1].split()[0])


def test_everything_imported_is_named():
    """A module that comes by chance, through another package, may be gone with that package's next version."""
    packages = metadata.packages_distributions()
    named = {canonicalize_name(requirement.name): extra for extra, requirement in asked() if extra != "dev"}
    for room in ROOMS:
        for file in (ROOT / room).glob("*.py"):
            for module in third_party(file):
                names = [canonicalize_name(name) for name in packages.get(module, [])]
                owners = [WITH_OTHERS.get(module), *names]
                assert set(owners) & set(named), f"{file.relative_to(ROOT)} imports {module}, which nothing asks for"


def third_party(file):
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"calotype", "triton"}


def plant(folder, name, version):
    """An installed distribution, as far as Python's metadata can tell."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_the_doctor_names_an_old_package_and_how_to_renew_it(tmp_path, monkeypatch):
    plant(tmp_path, "pillow", "12.2.0")
    plant(tmp_path, "starlette", "1.0.0")
    monkeypatch.syspath_prepend(tmp_path)
    finding = doctor_packages.holes()
    assert finding.verdict == "FAIL"
    assert "pillow 12.2.0 (PYSEC-2026-2253" in finding.found and "starlette 1.0.0" in finding.found
    assert "-m pip install --upgrade 'pillow>=12.3' 'starlette>=1.3.1'" in finding.way_out
    assert "torch" not in finding.found
    assert doctor_packages.versions().verdict == "FAIL"


class Database(HTTPServer):
    """Answers as the OSV database does, about the packages of `known` (name -> id)."""

    def __init__(self, known):
        self.known, self.asked = known, []
        super().__init__(("127.0.0.1", 0), Answer)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1/query"


class Answer(BaseHTTPRequestHandler):
    def do_POST(self):
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = query["package"]["name"]
        self.server.asked.append(name)
        body = json.dumps({"vulns": [vulnerability(name, i) for i in self.server.known.get(name, [])]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def vulnerability(name, identifier):
    ranges = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99.0"}]}]
    package = {"name": name, "ecosystem": "PyPI"}
    return {"id": identifier, "affected": [{"package": package, "ranges": ranges}], "published": "2026-01-01T00:00:00Z"}


def audit(url, tmp_path):
    """The real pip-audit, about two packages, at a database of ours; PyPI's is out of reach."""
    (tmp_path / "few.txt").write_text("accelerate==1.14.0\nfilelock==3.16.0\n")
    words = [f"--osv-url={url}", "--cache-dir", str(tmp_path / "cache"), "-r", str(tmp_path / "few.txt")]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9"}
    return subprocess.run(
        [sys.executable, ROOT / ".ci/audit.py", *words, "--no-deps", "--disable-pip"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.reliability
def test_the_audit_fails_for_a_hole_and_lets_the_accepted_one_be(tmp_path):
    database = Database(
        {"jinja2": ["GHSA-cpwx-vrp4-4pq7"], "filelock": ["GHSA-x"], "accelerate": ["GHSA-4j2p-28q2-5m79"]}
    )
    done = audit(database.url, tmp_path)
    assert done.returncode == 1, done.stderr
    assert "audit: filelock 3.16.0: GHSA-x, fixed in 99.0" in done.stderr and "accelerate" not in done.stderr
    assert "holes in 1 of 2 packages" in done.stdout and sorted(set(database.asked)) == [
        "accelerate",
        "filelock",
        "jinja2",
    ]


@pytest.mark.reliability
def test_the_audit_passes_where_a_trusted_database_knows_nothing(tmp_path):
    done = audit(Database({"jinja2": ["GHSA-cpwx-vrp4-4pq7"]}).url, tmp_path)
    assert done.returncode == 0 and "SKIPPED" not in done.stderr
    assert "holes in 0 of 2 packages" in done.stdout


@pytest.mark.reliability
@pytest.mark.parametrize("kind", ["silent", "out of reach"])
def test_silence_is_not_taken_for_safety(tmp_path, kind):
    url = Database({}).url if kind == "silent" else "http://127.0.0.1:9/v1/query"
    done = audit(url, tmp_path)
    assert done.returncode == 0
    assert done.stderr.startswith("audit: SKIPPED, nobody was asked") and done.stderr.count("\n") == 1
    assert ("it knows of no hole in jinja2==3.1.5" in done.stderr) == (kind == "silent")
