"""Send lines to a worker and ask about them. Usage: ... | python examples/follow_a_queue.py HOST PORT SESSION QUESTION

Start the worker first: longstride worker --broker mqtt://HOST:PORT
"""

import asyncio
import json
import sys
import uuid

import aiomqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties


async def main(host: str, port: str, session: str, question: str) -> None:
    """Every line of standard input becomes a message; the answer comes back on a topic of our own."""
    me = f"longstride-replies/{uuid.uuid4()}"
    to = f"longstride/sessions/{session}"
    async with aiomqtt.Client(host, int(port), protocol=aiomqtt.ProtocolVersion.V5) as client:
        await client.subscribe(me, qos=1)
        for line in sys.stdin:
            # an id of its own: without it, a line that comes twice would be taken for a repetition
            await client.publish(f"{to}/feed", json.dumps({"id": str(uuid.uuid4()), "text": line}), qos=1)
        request = Properties(PacketTypes.PUBLISH)
        request.ResponseTopic, request.CorrelationData = me, b"my question"
        await client.publish(f"{to}/ask", json.dumps({"question": question}), qos=1, properties=request)
        async for message in client.messages:
            answer = json.loads(message.payload)
            print(answer["error"] if "error" in answer else answer["text"])
            for source in answer.get("sources", []):
                print(f"- {source['document']}, characters {source['start']} to {source['stop']}")
            return


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
