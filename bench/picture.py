"""The picture of the README: the first screen of a run's report, taken by headless Chromium.

    python bench/picture.py runs/<id>          docs/img/report.png

The page is the run's own report.html, made again first. 1,000 pixels wide, in 64 colours, so that the file stays small.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--to", type=Path, default=ROOT / "docs" / "img" / "report.png")
    parser.add_argument("--height", type=int, default=900)
    options = parser.parse_args()
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        raise SystemExit(f"none of {', '.join(BROWSERS)} is on the path")
    from cai.report.pages import write_pages

    run = options.run.resolve()
    write_pages(run)
    options.to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--screenshot={shot}"]
        command += [f"--window-size=1000,{options.height}", f"--user-data-dir={folder}/profile"]
        subprocess.run([*command, (run / "report.html").as_uri()], check=True, capture_output=True, timeout=120)
        from PIL import Image

        with Image.open(shot) as image:
            image.convert("RGB").quantize(64).save(options.to, optimize=True)
    print(f"{options.to}: {options.to.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
