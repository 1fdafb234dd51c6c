-- A request has ended: its lease ends, and its account changes by the difference to what was reserved. Told again, or of a
-- request that was never let in, it changes nothing. `late` is for one that was let in without Redis: it has no lease, and counts.
-- Returns 1 if it counted, else 0.
local id, late = ARGV[1], ARGV[2] == '1'
local request_limit, token_limit, keep = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[9])
local score = tonumber(redis.call('ZSCORE', leases, id) or 0)
if score < 0 then return 0 end
redis.call('ZADD', leases, string.format('%.0f', -(now + keep)), id)
tidy(keep)
if score == 0 and not late then return 0 end
local requests, tokens, spent, ends = read(request_limit, token_limit)
local cost, ends_then = tonumber(ARGV[7]), tonumber(ARGV[8])
if ends < ends_then then spent, ends = 0, ends_then end
if ends == ends_then then spent = spent + cost end
write(requests + tonumber(ARGV[5]), tokens + tonumber(ARGV[6]), spent, ends, request_limit, token_limit)
return 1
