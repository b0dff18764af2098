/* Ends a stream of server-sent events with an error event if its engine is lost in mid-stream.
 *
 * A network filter of Envoy (proxy-wasm ABI 0.2.1) between an engine and Envoy's HTTP codec. It follows the framing of
 * HTTP/1.1 responses and appends data in one case only: the engine closes the connection in mid-stream, between two
 * chunks. Then it appends an error event and the end of the chunked body. In all other cases (within a chunk, in
 * responses that are no streams, between responses, behind a stream's last event) the connection ends as without the
 * filter. The form of the event depends on the path of the request, as official client libraries raise each by another.
 *
 * It uses no library: `make stream-end` builds it with clang alone. Its only state is that of its connections.
 */

typedef unsigned int u32;
typedef unsigned long long u64;

#define IMPORT(name) __attribute__((import_module("env"), import_name(#name))) extern
#define EXPORT(name) __attribute__((export_name(#name)))

IMPORT(proxy_get_buffer_bytes) u32 proxy_get_buffer_bytes(u32 type, u32 start, u32 size, char **data, u32 *length);
IMPORT(proxy_set_buffer_bytes) u32 proxy_set_buffer_bytes(u32 type, u32 start, u32 size, const char *data, u32 length);
IMPORT(proxy_define_metric) u32 proxy_define_metric(u32 type, const char *name, u32 length, u32 *id);
IMPORT(proxy_increment_metric) u32 proxy_increment_metric(u32 id, u64 by);

enum { DOWNSTREAM_DATA = 2, UPSTREAM_DATA = 3, COUNTER = 0, CONTINUE = 0, OK = 0 };

static const char METRIC[] = "dp_extproc_cut_streams";
#define TEXT "the server that was answering was lost; the answer is not complete"
#define CODE ",\"param\":null,\"code\":\"stream_cut\""
#define EVENT_OF_OPENAI \
  "event: error\ndata: {\"type\":\"error\",\"error\":{\"message\":\"" TEXT "\",\"type\":\"server_error\"" CODE "}}\n\n"
#define EVENT_OF_ANTHROPIC \
  "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"api_error\",\"message\":\"" TEXT "\"}}\n\n"
#define EVENT_OF_RESPONSES \
  "event: error\ndata: {\"type\":\"error\",\"error\":{\"message\":\"" TEXT "\",\"type\":\"server_error\"" CODE "}," \
  "\"message\":\"" TEXT "\"" CODE ",\"sequence_number\":"
static const char LAST_CHUNK[] = "0\r\n\r\n";
static const char DONE[] = "data: [DONE]\n\n";

enum api { OPENAI, RESPONSES, MESSAGES };

/* --- the responses of one connection --- */

enum state {
  HEAD,     /* status line and headers */
  SIZE,     /* of a chunk */
  DATA,     /* of a chunk */
  DATA_END, /* the line end after it */
  TRAILERS,
  LENGTH, /* a body with a content-length */
  REST,   /* a body that lasts as long as the connection */
};

enum { LINE = 64 }; /* longer than any text that is searched in a line */

struct answers {
  u32 id;
  struct answers *next;
  enum state state;
  u64 left;        /* bytes of the chunk, or of the body */
  u32 length;      /* of the current line or chunk; more than LINE if it is longer */
  u32 events;      /* chunks of the current body, as many as events */
  enum api api;    /* of the last request */
  int is_over;     /* whether what comes next from the client begins a request */
  int is_first;    /* whether it is the first line of its head */
  int has_no_body; /* 1xx (2), 204, 304: another head follows */
  int is_chunked, has_length, is_events;
  int is_complete; /* the last event ends its stream */
  char line[LINE]; /* in lower case */
};

static void begin_head(struct answers *it) {
  it->state = HEAD;
  it->length = 0;
  it->is_first = 1;
  it->has_no_body = it->is_chunked = it->has_length = it->is_events = it->is_complete = 0;
  it->left = 0;
  it->events = 0;
}

static void end_response(struct answers *it) {
  begin_head(it);
  it->is_over = 1;
}

static int starts(const char *data, u32 size, const char *with, u32 length) {
  if (size < length) return 0;
  for (u32 i = 0; i < length; i++)
    if (data[i] != with[i]) return 0;
  return 1;
}
#define STARTS(data, size, text) starts(data, size, text, sizeof text - 1)
#define BEGINS(it, text) STARTS((it)->line, (it)->length, text)

static int mentions(const struct answers *it, const char *what, u32 length) {
  u32 end = it->length < LINE ? it->length : LINE;
  for (u32 start = 0; start + length <= end; start++) {
    u32 i = 0;
    while (i < length && it->line[start + i] == what[i]) i++;
    if (i == length) return 1;
  }
  return 0;
}
#define MENTIONS(it, text) mentions(it, text, sizeof text - 1)

static u64 number(const struct answers *it, u32 from, u32 base) {
  u64 value = 0;
  u32 end = it->length < LINE ? it->length : LINE;
  while (from < end && it->line[from] == ' ') from++;
  for (; from < end; from++) {
    char c = it->line[from];
    u32 digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : 99;
    if (digit >= base) break;
    value = value * base + digit;
  }
  return value;
}

static void end_head(struct answers *it) {
  if (it->has_no_body) {
    int is_interim = it->has_no_body > 1;
    begin_head(it);
    it->is_over = !is_interim;
  } else if (it->is_chunked) {
    it->state = SIZE;
  } else if (it->has_length) {
    it->state = LENGTH;
    if (it->left == 0) end_response(it);
  } else {
    it->state = REST;
  }
}

static void end_line(struct answers *it) {
  if (it->state == SIZE) {
    it->left = number(it, 0, 16);
    it->state = it->left ? DATA : TRAILERS;
  } else if (it->state == DATA_END) {
    it->state = SIZE;
  } else if (it->state == TRAILERS) {
    if (it->length == 0) end_response(it);
  } else if (it->length == 0) {
    end_head(it);
  } else if (it->is_first) {
    it->is_first = 0;
    it->has_no_body = it->line[9] == '1' ? 2 : MENTIONS(it, " 204") || MENTIONS(it, " 304");
  } else if (BEGINS(it, "transfer-encoding:")) {
    it->is_chunked = MENTIONS(it, "chunked");
  } else if (BEGINS(it, "content-type:")) {
    it->is_events = MENTIONS(it, "text/event-stream");
  } else if (BEGINS(it, "content-length:")) {
    it->has_length = 1;
    it->left = number(it, sizeof "content-length:" - 1, 10);
  }
  it->length = 0;
}

static int ends(const char *data, u32 size, const char *with, u32 length) {
  return size >= length && starts(data + size - length, length, with, length);
}

/* Streams of OpenAI's first two APIs end with [DONE], those of the others with an event of its own name. */
static int is_last(const struct answers *it, const char *data, u32 size) {
  return ends(data, size, DONE, sizeof DONE - 1) || BEGINS(it, "event: message_stop") || BEGINS(it, "event: error") ||
         BEGINS(it, "event: response.completed") || BEGINS(it, "event: response.incomplete") ||
         BEGINS(it, "event: response.failed") || BEGINS(it, "event: response.cancelled");
}

static char lower(char c) { return c >= 'A' && c <= 'Z' ? c + ('a' - 'A') : c; }

static void read(struct answers *it, const char *data, u32 size) {
  u32 at = 0;
  while (at < size) {
    if (it->state == REST) return;
    if (it->state == DATA || it->state == LENGTH) {
      u32 here = it->left < size - at ? (u32)it->left : size - at;
      for (u32 i = 0; it->state == DATA && it->length < LINE && i < here; i++) it->line[it->length++] = lower(data[at + i]);
      at += here;
      it->left -= here;
      if (it->left) return;
      if (it->state == LENGTH) {
        end_response(it);
      } else {
        it->is_complete = is_last(it, data, at);
        it->state = DATA_END;
        it->length = 0;
        it->events++;
      }
      continue;
    }
    char c = data[at++];
    if (c == '\n') {
      end_line(it);
    } else if (c != '\r') {
      if (it->length < LINE) it->line[it->length] = lower(c);
      it->length++;
    }
  }
}

/* --- all connections of a thread --- */

enum { BUCKETS = 1024, PAGE = 65536 };

extern char __heap_base;
static char *heap_top, *heap_end;
static struct answers *buckets[BUCKETS], *unused;
static char *scratch;
static u32 scratch_size, metric;

static void *take(u32 size) {
  if (!heap_top) {
    heap_top = &__heap_base;
    heap_end = (char *)(__builtin_wasm_memory_size(0) * PAGE);
  }
  size = (size + 15) & ~15u;
  if (heap_top + size > heap_end) {
    u32 pages = (size + PAGE - 1) / PAGE;
    if (__builtin_wasm_memory_grow(0, pages) == (u32)-1) __builtin_trap();
    heap_end += pages * PAGE;
  }
  void *taken = heap_top;
  heap_top += size;
  return taken;
}

static struct answers **find(u32 id) {
  struct answers **at = &buckets[id % BUCKETS];
  while (*at && (*at)->id != id) at = &(*at)->next;
  return at;
}

enum { EVENT_SIZE = 512 }; /* more than the longest */

static u32 put(char *to, u32 at, const char *text, u32 length) {
  for (u32 i = 0; i < length; i++) to[at + i] = text[i];
  return at + length;
}
#define PUT(to, at, text) put(to, at, text, sizeof text - 1)

static u32 put_number(char *to, u32 at, u32 value, u32 base) {
  char digits[10];
  u32 count = 0;
  do {
    digits[count++] = "0123456789abcdef"[value % base];
    value /= base;
  } while (value);
  while (count) to[at++] = digits[--count];
  return at;
}

static u32 put_event(char *to, const struct answers *it) {
  if (it->api == MESSAGES) return PUT(to, 0, EVENT_OF_ANTHROPIC);
  if (it->api == OPENAI) return PUT(to, 0, EVENT_OF_OPENAI);
  u32 at = put_number(to, PUT(to, 0, EVENT_OF_RESPONSES), it->events, 10);
  return PUT(to, at, "}\n\n");
}

static void append(u32 at, const struct answers *it) {
  char event[EVENT_SIZE], text[EVENT_SIZE + 32];
  u32 length = 0;
  if (!it->is_complete) {
    u32 size = put_event(event, it);
    length = put_number(text, 0, size, 16);
    length = PUT(text, length, "\r\n");
    length = put(text, length, event, size);
    length = PUT(text, length, "\r\n");
    proxy_increment_metric(metric, 1);
  }
  length = put(text, length, LAST_CHUNK, sizeof LAST_CHUNK - 1);
  proxy_set_buffer_bytes(UPSTREAM_DATA, at, 0, text, length);
}

/* --- what Envoy calls --- */

EXPORT(proxy_abi_version_0_2_1) void proxy_abi_version(void) {}

/* One buffer is enough, since the filter reads one piece of data at a time. */
EXPORT(proxy_on_memory_allocate) void *proxy_on_memory_allocate(u32 size) {
  if (size > scratch_size) {
    scratch = take(size);
    scratch_size = size;
  }
  return scratch;
}

EXPORT(proxy_on_context_create) void proxy_on_context_create(u32 id, u32 parent) {
  if (!parent) return;
  struct answers *it = unused;
  if (it) {
    unused = it->next;
  } else {
    it = take(sizeof *it);
  }
  it->id = id;
  it->next = buckets[id % BUCKETS];
  buckets[id % BUCKETS] = it;
  it->api = OPENAI;
  end_response(it);
}

EXPORT(proxy_on_vm_start) u32 proxy_on_vm_start(u32 id, u32 size) {
  (void)id, (void)size;
  return proxy_define_metric(COUNTER, METRIC, sizeof METRIC - 1, &metric) == OK;
}

EXPORT(proxy_on_configure) u32 proxy_on_configure(u32 id, u32 size) {
  (void)id, (void)size;
  return 1;
}

/* Envoy sends a request when the response to the one before has ended, and its head in one piece. */
EXPORT(proxy_on_downstream_data) u32 proxy_on_downstream_data(u32 id, u32 size, u32 is_last) {
  (void)is_last;
  struct answers *it = *find(id);
  if (!it || !it->is_over || !size) return CONTINUE;
  char *data = 0;
  u32 length = 0;
  if (proxy_get_buffer_bytes(DOWNSTREAM_DATA, 0, size < LINE ? size : LINE, &data, &length) != OK) return CONTINUE;
  it->is_over = 0;
  it->api = STARTS(data, length, "POST /v1/messages")    ? MESSAGES
            : STARTS(data, length, "POST /v1/responses") ? RESPONSES
                                                         : OPENAI;
  return CONTINUE;
}

EXPORT(proxy_on_upstream_data) u32 proxy_on_upstream_data(u32 id, u32 size, u32 is_last) {
  struct answers *it = *find(id);
  if (!it) return CONTINUE;
  char *data = 0;
  u32 length = 0;
  if (size && proxy_get_buffer_bytes(UPSTREAM_DATA, 0, size, &data, &length) == OK) read(it, data, length);
  if (is_last && it->is_events && it->state == SIZE && !it->length) append(size, it);
  return CONTINUE;
}

EXPORT(proxy_on_delete) void proxy_on_delete(u32 id) {
  struct answers **at = find(id), *it = *at;
  if (!it) return;
  *at = it->next;
  it->next = unused;
  unused = it;
}
