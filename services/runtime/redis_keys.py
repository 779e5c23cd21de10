"""Names and encodings of everything that Tandem keeps in Redis.

{ns}:workers                        set of worker ids, dead ones until somebody reads them
{ns}:worker:{id}                    string, WorkerRecord as JSON, expires without heartbeat
{ns}:load:{id}                      string, WorkerLoad as JSON, expires without heartbeat
{ns}:kv:{id}:{incarnation}          stream; entry id `1-{sequence}`, field `b` is a
                                    KVEventBatch in msgpack; the newest few thousand
{ns}:blocks:{id}:{incarnation}      set of the block hashes (16 bytes each) after all of those
{ns}:announce                       pub/sub channel; a worker's id when it comes or leaves
{ns}:placed                         pub/sub channel; PlacedWork lists of routers in msgpack
{ns}:routers                        set of the ids of routers, dead ones until somebody reads them
{ns}:router:{id}                    string, empty, expires without heartbeat
{ns}:orders                         pub/sub channel; OrderMessages of routers in msgpack
{ns}:settings                       hash, live settings as JSON and their `version`; expires when
                                    no router renews it
{ns}:files                          sorted set of file ids by time; of expired ones until a listing
{ns}:file:{id}                      string, FileRecord as JSON; all keys of a file expire with it
{ns}:file:{id}:{n}                  string, its bytes from n * CHUNK_BYTES on
{ns}:batches                        sorted set of batch ids by time, expired ones as above
{ns}:batches:open                   set of the ids of batches that have still to be run
{ns}:batch:{id}                     string, BatchRecord as JSON; all keys of a batch expire with it
{ns}:batch:{id}:lease               string, who runs it; expires without renewal
{ns}:batch:{id}:cancel              string, Unix time at which it was cancelled
{ns}:batch:{id}:counts              hash, requests done and tokens used
{ns}:batch:{id}:results:{bucket}    hash, line number -> result, of 256 lines each
{ns}:response:{id}                  string, StoredResponse as JSON, expires
{ns}:response_runner:{id}           string, the router that runs it in the background; expires
                                    without renewal
{ns}:responses                      list of their ids and sizes, oldest first
{ns}:response_bytes                 sum of those sizes
"""

from dataclasses import dataclass

from protocol.ids import RouterId, WorkerId, WorkerRef

BATCH_FIELD = b"b"


@dataclass(frozen=True, slots=True)
class RedisKeys:
    """Key names under one namespace; several stacks may share a Redis with different ones."""

    namespace: str = "tandem"

    @property
    def workers(self) -> str:
        return f"{self.namespace}:workers"

    @property
    def announce(self) -> str:
        return f"{self.namespace}:announce"

    @property
    def placed(self) -> str:
        return f"{self.namespace}:placed"

    @property
    def routers(self) -> str:
        return f"{self.namespace}:routers"

    @property
    def orders(self) -> str:
        return f"{self.namespace}:orders"

    @property
    def settings(self) -> str:
        return f"{self.namespace}:settings"

    @property
    def files(self) -> str:
        return f"{self.namespace}:files"

    @property
    def batches(self) -> str:
        return f"{self.namespace}:batches"

    @property
    def open_batches(self) -> str:
        return f"{self.namespace}:batches:open"

    def file(self, file_id: str) -> str:
        return f"{self.namespace}:file:{file_id}"

    def file_chunk(self, file_id: str, index: int) -> str:
        return f"{self.namespace}:file:{file_id}:{index}"

    def batch(self, batch_id: str) -> str:
        return f"{self.namespace}:batch:{batch_id}"

    def batch_part(self, batch_id: str, part: str) -> str:
        """`part` is `lease`, `cancel`, `counts` or `results:{bucket}`."""
        return f"{self.namespace}:batch:{batch_id}:{part}"

    @property
    def responses(self) -> str:
        return f"{self.namespace}:responses"

    @property
    def response_bytes(self) -> str:
        return f"{self.namespace}:response_bytes"

    def worker(self, worker_id: WorkerId) -> str:
        return f"{self.namespace}:worker:{worker_id}"

    def router(self, router_id: RouterId) -> str:
        return f"{self.namespace}:router:{router_id}"

    def load(self, worker_id: WorkerId) -> str:
        return f"{self.namespace}:load:{worker_id}"

    def response(self, response_id: str) -> str:
        return f"{self.namespace}:response:{response_id}"

    def response_runner(self, response_id: str) -> str:
        return f"{self.namespace}:response_runner:{response_id}"

    def kv_stream(self, ref: WorkerRef) -> str:
        return f"{self.namespace}:kv:{ref.worker_id}:{ref.incarnation}"

    def blocks(self, ref: WorkerRef) -> str:
        return f"{self.namespace}:blocks:{ref.worker_id}:{ref.incarnation}"


def member_id(member: bytes) -> str:
    """An id in a set or list; what is no UTF-8 becomes one that nobody has."""
    return member.decode(errors="replace")


def entry_id(sequence: int) -> str:
    """The stream's entry ids are the sequence numbers: Redis itself refuses one twice."""
    return f"1-{sequence}"


def sequence_of(entry: bytes) -> int:
    return int(entry.split(b"-")[1])
