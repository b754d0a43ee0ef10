"""The Lua scripts of the queue: each is one atomic change of the stream, its index and its blobs.

A full Redis refuses the first write of a script with OOM, but lets a script finish that has begun to write. So `PUT`
begins with XADD, which may be refused; of several groups either none is added then, or all. Scripts that free memory,
or write the few bytes that are needed before memory can be freed, begin with a write that is never refused: XACK, HDEL
or PERSIST, even if it changes nothing.
"""

from __future__ import annotations

from miles.queue.fencing import IS_FENCED

_PIECES = """
local function pieces(blob, name)
  local keys = {blob}
  for i = 1, tonumber(string.match(name, ':(%d+)$') or 1) - 1 do keys[#keys + 1] = blob .. '/' .. i end
  return keys
end
"""
"""The keys of a blob, from that of its first piece and its name; see `blobs`."""

PUT = (
    IS_FENCED
    + _PIECES
    + """
-- KEYS stream, index, fences ; of a group whose payload is a blob also blob_refs, blob
-- ARGV of each group: worker_id, lease_number, group_id, 'attempt oldest_version bytes', payload
-- of one whose payload is a blob, alone: its name as payload, then blob_ttl_s
local refs, blob = KEYS[4], KEYS[5]
local function put(worker, lease, group, numbers, payload)
  if fenced(KEYS[3], worker, lease) then return 'fenced' end
  local known = redis.call('HGET', KEYS[2], group)
  if known then return 'known ' .. string.match(known, '^(%S+)') end
  for _, piece in ipairs(blob and pieces(blob, payload) or {}) do
    if redis.call('EXISTS', piece) == 0 then return 'no-blob' end
  end
  local entry = redis.call('XADD', KEYS[1], '*', 'group_id', group, blob and 'blob' or 'group', payload)
  redis.call('HSET', KEYS[2], group, entry .. ' ' .. numbers .. ' ' .. (blob and payload or '-'))
  if blob then
    redis.call('HINCRBY', refs, payload, 1)
    for _, piece in ipairs(pieces(blob, payload)) do redis.call('EXPIRE', piece, ARGV[6]) end
  end
  return 'new ' .. entry
end
local answers = {}
for i = 1, #ARGV - 4, 5 do
  answers[#answers + 1] = put(ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4])
end
return answers
"""
)
"""Add groups, each once. Returns for each: new or known with the entry's id, fenced, or no-blob (it has expired)."""

DROP = (
    IS_FENCED
    + """
-- KEYS index, dropped, fences ; ARGV group_id, reason, worker_id, lease_number
redis.call('HDEL', KEYS[2], '')
if fenced(KEYS[3], ARGV[3], ARGV[4]) then return 'fenced' end
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1 then return 'queued' end
redis.call('HSETNX', KEYS[2], ARGV[1], ARGV[2])
return 'dropped'
"""
)
"""Record that a group will never be queued. Returns dropped, fenced, or queued (it is in the queue already)."""

REOPEN = """
-- KEYS fences ; ARGV closed, lease_number
redis.call('PERSIST', KEYS[1])
if redis.call('HGET', KEYS[1], '*') == ARGV[1] then redis.call('HSET', KEYS[1], '*', ARGV[2]) end
return 1
"""
"""Take entries again of a job whose queue was dropped, under leases from a number on."""

BEGIN_LIFE = """
-- KEYS lives, then every other key of the job that was given a time to live when it ended
for i = 1, #KEYS do redis.call('PERSIST', KEYS[i]) end
return redis.call('INCR', KEYS[1])
"""
"""Count a controller process that takes up the job, and keep what is queued. Returns how many there were."""

CREATE_GROUP = """
-- KEYS stream ; ARGV consumer_group
redis.call('XACK', KEYS[1], ARGV[1], '0-0')
local answer = redis.pcall('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
if answer.err and not string.find(answer.err, 'BUSYGROUP') then return redis.error_reply(answer.err) end
return 1
"""
"""Create the consumer group, starting at the first entry, unless it exists."""

READ = """
-- KEYS stream ; ARGV consumer_group, consumer, count
local answer = redis.call('XREADGROUP', 'GROUP', ARGV[1], ARGV[2], 'COUNT', ARGV[3], 'STREAMS', KEYS[1], '>')
local sizes, values = {}, {}
for _, entry in ipairs(answer and answer[1][2] or {}) do
  local line = {entry[1]}
  for _, value in ipairs(entry[2]) do
    line[#line + 1] = #value
    values[#values + 1] = value
  end
  sizes[#sizes + 1] = table.concat(line, ' ')
end
return {table.concat(sizes, ';'), table.concat(values)}
"""
"""Read entries that lie ready. Returns for each entry its id and the sizes of its names and values, and all of these
joined: one by one they cost the client several times as much."""

_RELEASE_BLOB = (
    _PIECES
    + """
local function release(refs, blob_prefix, name)
  if redis.call('HINCRBY', refs, name, -1) <= 0 then
    redis.call('HDEL', refs, name)
    for _, piece in ipairs(pieces(blob_prefix .. name, name)) do redis.call('UNLINK', piece) end
  end
end
"""
)

ACKNOWLEDGE = (
    _RELEASE_BLOB
    + """
-- KEYS stream, index, blob_refs, dropped ; ARGV consumer_group, blob_prefix, then pairs of group_id, entry_id
local removed = 0
for i = 3, #ARGV, 2 do
  if ARGV[i + 1] == '' then redis.call('HDEL', KEYS[4], ARGV[i]) end
  local entry, hash = string.match(redis.call('HGET', KEYS[2], ARGV[i]) or '', '^(%S+) %S+ %S+ %S+ (%S+)$')
  if entry and (ARGV[i + 1] == '' or ARGV[i + 1] == entry) then
    redis.call('XACK', KEYS[1], ARGV[1], entry)
    redis.call('XDEL', KEYS[1], entry)
    redis.call('HDEL', KEYS[2], ARGV[i])
    if hash ~= '-' then release(KEYS[3], ARGV[2], hash) end
    removed = removed + 1
  end
end
return removed
"""
)
"""Delete groups for good. An entry id of '' means the group's current entry. Returns how many existed."""

BURY = (
    _RELEASE_BLOB
    + """
-- KEYS stream, index, blob_refs, dead ; ARGV consumer_group, blob_prefix, entry_id, group_id, reason, max_dead
redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
local found = redis.call('XRANGE', KEYS[1], ARGV[3], ARGV[3])
local fields = found[1] and found[1][2] or {}
redis.call('XADD', KEYS[4], 'MAXLEN', ARGV[6], '*', 'dead_entry_id', ARGV[3], 'dead_group_id', ARGV[4],
  'dead_reason', ARGV[5], unpack(fields))
redis.call('XDEL', KEYS[1], ARGV[3])
local entry, hash = string.match(redis.call('HGET', KEYS[2], ARGV[4]) or '', '^(%S+) %S+ %S+ %S+ (%S+)$')
if entry == ARGV[3] then
  redis.call('HDEL', KEYS[2], ARGV[4])
  if hash ~= '-' then release(KEYS[3], ARGV[2], hash) end
end
return 1
"""
)
"""Move an entry to the dead-letter stream, so that its group can be put again."""

SAVE_PARTIAL = """
-- KEYS partial ; ARGV attempt, ttl_s, 'all' or 'some', then pairs of field, payload
local stored = redis.call('HGET', KEYS[1], 'attempt')
if stored and tonumber(stored) > tonumber(ARGV[1]) then return 'later' end
if ARGV[3] == 'some' and stored ~= ARGV[1] then return 'incomplete' end
local old = ARGV[3] == 'all' and redis.call('HKEYS', KEYS[1]) or {}
redis.call('HSET', KEYS[1], 'attempt', ARGV[1])
local written = {attempt = true}
for i = 4, #ARGV, 2 do
  redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
  written[ARGV[i]] = true
end
for _, field in ipairs(old) do
  if not written[field] then redis.call('HDEL', KEYS[1], field) end
end
redis.call('EXPIRE', KEYS[1], ARGV[2])
return 'stored'
"""
"""Store all samples of a half-finished group, or those that have changed since this attempt stored it. Returns stored,
later (a later attempt has stored the group), or incomplete (some were given, but the others are not there)."""
