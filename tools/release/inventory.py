"""What comes with the archives of a release: a bill of materials, and checksums."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import zipfile
from datetime import datetime, timezone
from email import message_from_bytes
from pathlib import Path
from uuid import NAMESPACE_URL, uuid5

from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentScope, ComponentType
from cyclonedx.model.contact import OrganizationalEntity
from cyclonedx.model.license import LicenseExpression
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL

from release import Fault, build_environment
from release.wheel import LIBRARIES

SUMS = "SHA256SUMS"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_bill(sdist: Path, wheel: Path) -> Path:
    """Writes bnbops-<version>.cdx.json beside them (CycloneDX 1.6): the two archives with their checksums, the packages
    that pip installs with them, and what is linked into the libraries. Dated as the archives are."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata, names = message_from_bytes(archive.read(name)), archive.namelist()
    main = Component(
        name=metadata["Name"],
        version=metadata["Version"],
        type=ComponentType.LIBRARY,
        description=metadata["Summary"],
        licenses=[LicenseExpression(metadata["License-Expression"])],
        purl=PackageURL("pypi", name=metadata["Name"], version=metadata["Version"]),
        bom_ref="bnbops",
    )
    archives = [
        Component(
            name=path.name,
            version=metadata["Version"],
            type=ComponentType.FILE,
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=sha256(path))],
            bom_ref=path.name,
        )
        for path in (sdist, wheel)
    ]
    parts = [_installed_beside(line) for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    if LIBRARIES[1] in names:
        parts.append(_cuda_runtime())
    bill = Bom(components=[*archives, *parts], serial_number=uuid5(NAMESPACE_URL, sha256(wheel)))
    bill.metadata.component = main
    bill.metadata.timestamp = datetime.fromtimestamp(int(build_environment()["SOURCE_DATE_EPOCH"]), timezone.utc)
    bill.register_dependency(main, parts)
    path = wheel.with_name(f"{metadata['Name']}-{metadata['Version']}.cdx.json")
    text = make_outputter(bill, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string(indent=2)
    path.write_text(text + "\n")
    return path


def _installed_beside(requirement: str) -> Component:
    """A package that pip installs in a version of its own choice, which the description tells."""
    name = re.match(r"[\w.-]+", requirement)[0]
    return Component(
        name=name,
        type=ComponentType.LIBRARY,
        scope=ComponentScope.REQUIRED,
        description=f"not part of the wheel; pip installs {requirement}",
        purl=PackageURL("pypi", name=name),
        bom_ref=name,
    )


def _cuda_runtime() -> Component:
    """NVIDIA's CUDA runtime, which libbnbops_cuda.so has inside."""
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    version = re.search(r"release [\d.]+, V([\d.]+)", said)
    return Component(
        name="cudart_static",
        version=version and version[1],
        type=ComponentType.LIBRARY,
        supplier=OrganizationalEntity(name="NVIDIA"),
        description="CUDA runtime, linked into libbnbops_cuda.so (version of the nvcc that built it)",
        bom_ref="cudart_static",
    )


def check_bill(path: Path, sdist: Path, wheel: Path) -> None:
    """It follows CycloneDX's schema, and its checksums are those of the two archives."""
    text = path.read_text()
    if error := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text):
        raise Fault(f"{path.name} does not follow CycloneDX 1.6: {str(error.data.message)[:200]}")
    recorded = {part["name"]: part.get("hashes", [{}])[0].get("content") for part in json.loads(text)["components"]}
    for archive in (sdist, wheel):
        if recorded.get(archive.name) != sha256(archive):
            raise Fault(f"{path.name}: {archive.name} is missing, or has another SHA-256 there")


def write_sums(files: list[Path]) -> Path:
    """Writes SHA256SUMS beside the files: `sha256sum --check SHA256SUMS` reads it."""
    path = files[0].with_name(SUMS)
    path.write_text("".join(f"{sha256(file)}  {file.name}\n" for file in sorted(files)))
    return path


def check_sums(path: Path) -> None:
    """Every other file of the folder is in it, with its checksum."""
    recorded = dict(reversed(line.split("  ", 1)) for line in path.read_text().splitlines())
    files = {file.name: sha256(file) for file in path.parent.iterdir() if file != path}
    if wrong := sorted(name for name in {*recorded, *files} if recorded.get(name) != files.get(name)):
        raise Fault(f"{path.name} is not that of its folder: {', '.join(wrong)}")
