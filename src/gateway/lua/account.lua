-- An account is one hash: `at` (milliseconds), `requests` and `tokens` (parts used and not leaked away; see core/ratelimit.py),
-- `spent` in the period that `ends` (Unix seconds). Beside it is a sorted set of leases: each request that was let in, with the
-- time its lease ends as its score; a negative score marks one that has been settled, so that no word of it counts twice.
-- Numbers are whole and below 2^53, which Lua's doubles and Redis' text of them keep exactly. -1 is no limit.
local account, leases = KEYS[1], KEYS[2]
local PARTS, OWED = 60000, 9000000000000000
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function leaked(used, at, limit)
  if limit < 0 then return 0 end
  return math.max(used - math.max(now - at, 0) * limit, 0)
end

local function read(request_limit, token_limit)
  local found = redis.call('HMGET', account, 'at', 'requests', 'tokens', 'spent', 'ends')
  local at = tonumber(found[1]) or now
  return leaked(tonumber(found[2]) or 0, at, request_limit), leaked(tonumber(found[3]) or 0, at, token_limit),
    tonumber(found[4]) or 0, tonumber(found[5]) or 0
end

-- It is kept until it says nothing that a new one would not.
local function write(requests, tokens, spent, ends, request_limit, token_limit)
  requests, tokens = math.min(math.max(requests, 0), OWED), math.min(math.max(tokens, 0), OWED)
  redis.call('HSET', account, 'at', now, 'requests', requests, 'tokens', tokens, 'spent', math.max(spent, 0), 'ends', ends)
  local left = 1000
  if request_limit > 0 then left = math.max(left, math.ceil(requests / request_limit)) end
  if token_limit > 0 then left = math.max(left, math.ceil(tokens / token_limit)) end
  if spent > 0 then left = math.max(left, ends * 1000 - now) end
  redis.call('PEXPIRE', account, left + 1000)
end

-- Of three ends of a period (the last one, this one, the next one as the gateway has them) the one that Redis' clock is before.
local function period(last, this, next)
  if now < last * 1000 then return last elseif now < this * 1000 then return this else return next end
end

-- Whoever has not been heard of for `keep` milliseconds will not be; nor need its having been settled be known any longer.
local function tidy(keep)
  redis.call('ZREMRANGEBYSCORE', leases, string.format('(%.0f', -now), string.format('%.0f', now - keep))
  redis.call('PEXPIRE', leases, keep + 60000)
end
