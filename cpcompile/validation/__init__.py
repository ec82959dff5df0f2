"""Proof: engine against eager model on parity, quality, memory and speed.

    validator.validate -> VariantResult per context and variant
      parity     Parity      engine against the masked eager model: the compiler's correctness
      quality    Quality     engine against the dense baseline on held-out text
      memory     Memory      peak RSS of loading and running, each side in a fresh process
      speed      Speed       interleaved timings, percentiles, ratio with its interval
      placement  Placement   which provider ran which node

Results are frozen dataclasses whose fields are the keys of report.json. A value that was not
measured is `NotMeasured` with the reason.
"""
