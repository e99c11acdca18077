"""What a bundle of the main job must satisfy, for the tests that run it on real models and images."""

from gcvit_edge.backends import backend_names
from gcvit_edge.bundle import Bundle


def check_bundle(bundle: Bundle, images: int) -> None:
    """What the recipe int8_ptq promises, on every backend."""
    report = bundle.report
    assert report["images"] == images
    assert sorted(entry["backend"] for entry in report["artifacts"]) == backend_names()
    for entry in report["artifacts"]:
        assert entry["drop_points"] <= 0.5, entry
        assert entry["agreement"] >= 0.985, entry
        assert entry["sqnr_db"] >= 25, entry
        assert entry["size_bytes"] <= 0.27 * entry["float_size_bytes"], entry
        assert entry["within_limits"]
    assert bundle.manifest.within_limits
    assert all(parity.same_top1 == 1 for parity in bundle.verify().values())
