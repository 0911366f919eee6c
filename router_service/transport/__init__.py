"""One seam (`base.Transport`), three ways through it: in process, gRPC, Ray object refs."""
