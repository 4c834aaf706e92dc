"""Test client with the `websockets` library: python.py URL PROTOCOL|- deflate|plain

Prints one line per event; closes the session at the end of its input.
"""

import asyncio
import base64
import sys

from websockets.asyncio.client import connect


def say(*words):
    print(*words, flush=True)


async def close_at_end_of_input(socket):
    await asyncio.to_thread(sys.stdin.read)
    await socket.close(1000)


async def main(url, protocol, compression):
    protocols = None if protocol == "-" else [protocol]
    compression = "deflate" if compression == "deflate" else None
    async with connect(url, subprotocols=protocols, compression=compression) as socket:
        extensions = socket.response.headers.get("Sec-WebSocket-Extensions", "-")
        say("open", socket.subprotocol or "-", extensions)
        await socket.send('{"last_sequences":{}}')
        closing = asyncio.create_task(close_at_end_of_input(socket))
        async for message in socket:
            if isinstance(message, bytes):
                say("binary", base64.b64encode(message).decode())
            else:
                say("text", message)
        say("closed", socket.close_code, socket.close_reason)
        await closing


asyncio.run(main(*sys.argv[1:]))
