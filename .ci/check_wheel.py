"""Check a built wheel: under 25 MB, with both models' weights, samples, licences and type marker inside."""

import sys
import zipfile
from pathlib import Path

wheel = Path(sys.argv[1])
names = zipfile.ZipFile(wheel).namelist()
size = wheel.stat().st_size / 1e6
needed = [
    "mmneurons/py.typed",
    "mmneurons/pocket/data/model/model.safetensors",
    "mmneurons/pocket/data/sprites.webp",
    "mmneurons/pocket/data/samples/samples.json",
    "mmneurons/photo/data/projector.safetensors",
    "mmneurons/report/report.html.j2",
    "licenses/LICENSE",
    "licenses/NOTICE",
    "licenses/LICENSES/CC-BY-4.0.txt",
    "licenses/LICENSES/MIT.txt",
    "licenses/LICENSES/OFL-1.1.txt",
]
missing = [name for name in needed if not any(have.endswith(name) for have in names)]
assert not missing, f"not in the wheel: {missing}"
assert size < 25, f"{size:.1f} MB"
metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
text = zipfile.ZipFile(wheel).read(metadata).decode()
assert "License-Expression: Apache-2.0 AND OFL-1.1 AND CC-BY-4.0 AND MIT" in text
print(f"{wheel.name}: {size:.1f} MB, {len(names)} files")
