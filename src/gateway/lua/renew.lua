-- These requests still run: their leases last longer. Redis may have forgotten them; it may not have heard of them yet.
local lease, keep = tonumber(ARGV[1]), tonumber(ARGV[2])
for index = 3, #ARGV do
  local score = tonumber(redis.call('ZSCORE', leases, ARGV[index]) or 0)
  if score >= 0 then redis.call('ZADD', leases, now + lease, ARGV[index]) end
end
tidy(keep)
return 1
