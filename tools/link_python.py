# SPDX-License-Identifier: Apache-2.0
"""Makes `import msa` work in this environment: writes a .pth file that names the source tree's python/ folder."""

import pathlib
import sysconfig

ROOT = pathlib.Path(__file__).resolve().parent.parent

if __name__ == "__main__":
    pth = pathlib.Path(sysconfig.get_paths()["purelib"]) / "msa.pth"
    line = f"{ROOT / 'python'}\n"
    if not pth.exists() or pth.read_text() != line:
        pth.write_text(line)
