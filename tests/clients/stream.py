"""gRPC test client with stubs generated from proto/: stream.py ADDRESS USER DEVICE [CONVERSATION SEQUENCE [CA]]

CA: a PEM file with the authority of the server; with it the client speaks TLS. Prints one line per event: conversation, sequence, content. Stops at the end of its input, or when the
server closes the stream (and prints the status).

    python3 -m venv env && env/bin/pip install grpcio-tools
    env/bin/python tests/clients/stream.py 127.0.0.1:50054 alice laptop
"""

import pathlib
import queue
import sys
import tempfile
import threading

import grpc
import grpc_tools
from grpc_tools import protoc

PROTO = pathlib.Path(__file__).resolve().parents[2] / "proto"
WELL_KNOWN = pathlib.Path(grpc_tools.__file__).parent / "_proto"


def generated_stubs():
    """Compiles proto/ into a temporary folder and imports the result."""
    out = tempfile.mkdtemp(prefix="delivery-stubs-")
    files = [str(path) for path in PROTO.rglob("*.proto")]
    includes = [f"-I{PROTO}", f"-I{WELL_KNOWN}"]
    assert protoc.main(["protoc", *includes, f"--python_out={out}", f"--grpc_python_out={out}", *files]) == 0
    sys.path.insert(0, out)
    from realchat.delivery.v1 import delivery_api_pb2, delivery_api_pb2_grpc

    return delivery_api_pb2, delivery_api_pb2_grpc


def open_channel(address, authority):
    if authority is None:
        return grpc.insecure_channel(address)
    roots = pathlib.Path(authority).read_bytes()
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(root_certificates=roots))


def main(address, user, device, conversation="", sequence="0", authority=None):
    messages, services = generated_stubs()
    requests = queue.SimpleQueue()
    requests.put(
        messages.DeliveryConnectRequest(
            user_id=user,
            device_id=device,
            conversation_id=conversation,
            last_received_sequence=int(sequence),
        )
    )

    with open_channel(address, authority) as channel:
        events = services.DeliveryApiStub(channel).Connect(iter(requests.get, None))

        def cancel_at_end_of_input():
            sys.stdin.read()
            events.cancel()

        threading.Thread(target=cancel_at_end_of_input, daemon=True).start()
        try:
            for event in events:
                content = event.message.content if event.HasField("message") else "-"
                print("event", event.conversation_id, event.sequence, content, flush=True)
            print("ended", flush=True)
        except grpc.RpcError as error:
            cancelled = error.code() == grpc.StatusCode.CANCELLED
            print(*(["ended"] if cancelled else ["status", error.code().name, error.details()]), flush=True)


main(*sys.argv[1:])
