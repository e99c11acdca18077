"""Energy counters of x86 CPUs (RAPL), as Linux shows them below /sys/class/powercap, for processes in Python.

The native runner has its own, and those of phones and boards: native/energy.h.

Source: Linux kernel documentation, Documentation/power/powercap/powercap.rst.
"""

from contextlib import suppress
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class Rapl:
    """The RAPL domains that this user may read: usually none but root's, and none in most virtual machines.

    A domain counts what its whole package or core uses, other processes included, in steps of about a millisecond.
    """

    def __init__(self, root: Path = POWERCAP) -> None:
        """Finds the domains below `root`; a sub-domain is named after its package too: `package-0/core`."""
        self._counters: dict[str, Path] = {}
        self._range_uj: dict[str, int] = {}
        for folder in sorted(root.glob("intel-rapl:*")):
            try:
                name = (folder / "name").read_text().strip()
                int((folder / "energy_uj").read_text())
                range_uj = int((folder / "max_energy_range_uj").read_text())
                if folder.name.count(":") > 1:
                    name = f"{(root / folder.name.rpartition(':')[0] / 'name').read_text().strip()}/{name}"
            except (OSError, ValueError):
                continue
            self._counters[name], self._range_uj[name] = folder / "energy_uj", range_uj

    def read(self) -> dict[str, int]:
        """Microjoules that each domain has counted so far, without those that cannot be read now; they wrap around."""
        counts = {}
        for name, path in self._counters.items():
            with suppress(OSError, ValueError):  # the CPUs of a package may be switched off, or the right to read it taken away
                counts[name] = int(path.read_text())
        return counts

    def since(self, before: dict[str, int]) -> dict[str, float]:
        """Joules that each domain used since `read` gave `before`, one wrap allowed for; without those that cannot be told."""
        now = self.read()
        return {name: ((now[name] - start) % (self._range_uj[name] + 1)) / 1e6 for name, start in before.items() if name in now}
