# Two stages: a Debian with the toolchain builds, an image with glibc and nothing else runs.
#
#   docker build -t delivery .
#   docker run --rm --security-opt seccomp=deploy/seccomp.json delivery config --reference
#
# --security-opt: Docker's own profile leaves io_uring out, and the shards cannot start without it
# (docs/operations.md).

FROM rust:1.95-slim-bookworm AS build

# librdkafka, zstd and mimalloc are C sources inside their crates. No protoc: protox is Rust.
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc g++ make libc6-dev \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY Cargo.toml Cargo.lock build.rs ./
COPY proto proto
COPY src src
# Not compiled; cargo reads the manifests of development dependencies as well.
COPY tests/kit tests/kit
# The caches keep registry and objects between builds; the binary is copied out of them.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked --bin delivery \
 && cp target/release/delivery /delivery

FROM gcr.io/distroless/cc-debian12:nonroot

COPY --from=build /delivery /usr/local/bin/delivery

# 65532, as in the base image; numeric, so that Kubernetes can tell that it is not root.
USER 65532:65532

# Public WebSocket, admin, gRPC.
EXPOSE 8083 8093 50054

ENTRYPOINT ["/usr/local/bin/delivery"]
CMD ["serve"]
