"""The bundle: a folder (or zip) with the artifacts of one model and all that an app needs to run and check them."""

from gcvit_edge.bundle.bundle import Bundle as Bundle
from gcvit_edge.bundle.bundle import open_bundle as open_bundle
