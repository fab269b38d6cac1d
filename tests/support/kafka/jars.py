"""A real Kafka broker as a folder of jars, from Maven Central, fetched once into a cache outside the tree.

The tools are Java 17 and Maven and nothing else. A folder is complete when it has its final name, so an interrupted
download leaves none behind, and several processes may want the same version at once.
"""

import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

VERSIONS = {"4": "4.4.0", "3.9": "3.9.2"}
"""The releases that are tested, by the name they are asked for with; any other name is taken as a release."""

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "meterstream-kafka"
TOOLS = {"java": "openjdk-17-jre-headless", "mvn": "maven"}
_COPY = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies"

# slf4j-simple lets warnings of the broker reach its standard error; without a binding there are none.
_PROJECT = """<project>
  <modelVersion>4.0.0</modelVersion>
  <groupId>local</groupId><artifactId>broker</artifactId><version>1</version>
  <dependencies>
    <dependency>
      <groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>{version}</version>
      {exclusions}
    </dependency>
    <dependency><groupId>org.slf4j</groupId><artifactId>slf4j-simple</artifactId><version>1.7.36</version></dependency>
  </dependencies>
</project>
"""

# What a release asks for and does not have on Maven Central; it is for command line tools alone.
_TOOLS_API = "<groupId>org.apache.kafka</groupId><artifactId>kafka-tools-api</artifactId>"
_LACKING = {"4.4.0": f"<exclusions><exclusion>{_TOOLS_API}</exclusion></exclusions>"}


class Missing(Exception):
    """There can be no broker here; the message says what is needed."""


def release(name: str) -> str:
    """The full version for a name of ``VERSIONS``, or the name itself."""
    return VERSIONS.get(name, name)


def check_tools() -> None:
    """Raises Missing where Java or Maven is not installed."""
    missing = [package for command, package in TOOLS.items() if shutil.which(command) is None]
    if missing:
        raise Missing(f"a Kafka broker needs {' and '.join(missing)} (the names of Debian's packages)")


def jars(name: str) -> Path:
    """The folder with every jar of the release. Raises Missing when it is not here and cannot be fetched."""
    check_tools()
    version = release(name)
    folder = CACHE / version
    if folder.exists():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{version}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            _fetch(version, folder)
    return folder


def _fetch(version: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        project = Path(work) / "pom.xml"
        project.write_text(_PROJECT.format(version=version, exclusions=_LACKING.get(version, "")))
        into = Path(work) / "jars"
        options = ["-DincludeScope=runtime", f"-DoutputDirectory={into}", "-f", str(project)]
        command = [shutil.which("mvn") or "mvn", "-B", "-q", _COPY, *options]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise Missing(f"Maven could not fetch Kafka {version}: {done.stdout.strip()[:500]}")
        into.rename(folder)
