"""How good and how fast an artifact is: accuracy against float, parity with golden logits, latency; on this machine or on devices."""
