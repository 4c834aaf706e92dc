//! Configuration, wiring, shutdown, telemetry, the command line.
