-- Lets a request in, or says why not: {1 or 0, now, requests, tokens, running, spent, ends}. A refusal writes nothing but what
-- the gateway knows better.
local id = ARGV[1]
local request_limit, token_limit, most, amount = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local tokens_asked, cost = tonumber(ARGV[6]), tonumber(ARGV[7])
local ends_now = period(tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[10]))
local lease, keep = tonumber(ARGV[11]), tonumber(ARGV[12])
local requests, tokens, spent, ends = read(request_limit, token_limit)
-- What the gateway knows to be used, after a time in which it had to count by itself.
local news = tonumber(ARGV[13]) > requests or tonumber(ARGV[14]) > tokens
requests, tokens = math.max(requests, tonumber(ARGV[13])), math.max(tokens, tonumber(ARGV[14]))
if ends < ends_now then spent, ends = 0, ends_now end
local running = redis.call('ZCOUNT', leases, string.format('(%.0f', now), '+inf')
if (request_limit >= 0 and requests + PARTS > request_limit * PARTS)
  or (token_limit >= 0 and tokens + tokens_asked * PARTS > token_limit * PARTS)
  or (most >= 0 and running >= most)
  or (amount >= 0 and spent + cost > amount)
  or redis.call('ZADD', leases, 'NX', now + lease, id) == 0 then
  if news then write(requests, tokens, spent, ends, request_limit, token_limit) end
  return {0, now, requests, tokens, running, spent, ends}
end
if request_limit >= 0 then requests = requests + PARTS end
if token_limit >= 0 then tokens = tokens + tokens_asked * PARTS end
if amount >= 0 then spent = spent + cost end
write(requests, tokens, spent, ends, request_limit, token_limit)
tidy(keep)
return {1, now, requests, tokens, running + 1, spent, ends}
