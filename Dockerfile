# Two stages: Debian with the toolchain for the build, an image with only glibc and OpenSSL for the program.
#
#   docker build -t delivery .
#   docker run --rm --security-opt seccomp=deploy/seccomp.json delivery config --reference
#
# --security-opt: Docker's default profile blocks io_uring, which the shards need (docs/operations.md).

FROM rust:1.95-slim-bookworm AS build

# A C compiler for librdkafka, zstd and mimalloc, whose crates contain C sources, and OpenSSL for TLS and SASL to Kafka.
# The image of the program has the same OpenSSL. protoc is not needed.
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc g++ make libc6-dev libssl-dev pkg-config \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY Cargo.toml Cargo.lock build.rs ./
COPY .cargo .cargo
COPY proto proto
COPY src src
# Not compiled; cargo reads the manifests of development dependencies as well.
COPY tests/kit tests/kit
# The caches keep the registry and the objects between builds. They are not part of the image, so the
# binary is copied out of them.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked --bin delivery \
 && cp target/release/delivery /delivery

FROM gcr.io/distroless/cc-debian12:nonroot

COPY --from=build /delivery /usr/local/bin/delivery

# The user of the base image. Numeric, so that Kubernetes can verify that it is not root.
USER 65532:65532

# Public WebSocket, admin, gRPC.
EXPOSE 8083 8093 50054

ENTRYPOINT ["/usr/local/bin/delivery"]
CMD ["serve"]
